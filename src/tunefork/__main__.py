from tunefork.cli import main

main()
