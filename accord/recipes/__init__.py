"""Shipped recipes (all settings of a whole run) and the prompts written for this project."""
