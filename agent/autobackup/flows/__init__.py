"""Verbs: what the agent does with the rooms below. Nothing here knows how it is served or configured."""
