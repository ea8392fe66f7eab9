"""The parts of the command line that need no file of weights: arguments, the terminal, and where results go."""
