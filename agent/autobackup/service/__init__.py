"""The faces: the service itself, its HTTP socket, its command line."""
