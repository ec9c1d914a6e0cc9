"""Looking at attention during an ordinary run: what every head would lose at every budget."""
