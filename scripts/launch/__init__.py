"""Setting up and starting Stretto's surroundings. Standard library only: it runs before anything is installed."""
