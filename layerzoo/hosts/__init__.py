"""Layers in models that already exist: the planner (`surgery`), its `report`, and one module of recipes for each host.

A module of recipes imports its host at its top, so it is imported only when a model of that host is at hand.
"""
