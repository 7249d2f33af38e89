"""The master's side: one process, one thread, one loop, no code of the user's. It never imports the serving side."""
