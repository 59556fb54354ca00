"""Doors into other people's models. Each one is opened by a call, and closed again by another."""
