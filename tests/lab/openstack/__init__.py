"""A private cloud of real services: Keystone, Barbican and Glance. `Cloud` in `cloud.py` is the way in."""
