"""Fine-tuning jobs: their states, their rows, what is run for them, and the queue they wait in."""
