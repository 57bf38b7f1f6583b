"""Environments made with other libraries, turned into scenarios and rollout functions.

Each module is for one library, which an extra of art-core brings; none is imported before it is asked for by name.
"""
