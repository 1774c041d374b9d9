"""The paths of the API, a file a kind of object."""
