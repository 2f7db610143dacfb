"""A small local page that follows runs: an index of folders, a follower of metrics, and a server that only reads.

Nothing here imports torch: the page may stay open beside runs that need the memory.
"""
