"""Where a run computes: one mesh over all devices, and several processes as one run.

Also what a process does beside computing: compiled programs kept on disk, reading ahead, SIGTERM.
"""
