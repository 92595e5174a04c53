"""A real nova-api without any nova-compute, beside the private cloud. `Nova` in `nova.py` is the way in."""
