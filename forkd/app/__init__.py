"""Assembly: puts settings, sockets, the master and the workers together. Here alone the two sides meet: the master is
handed the function that its forked children run.
"""
