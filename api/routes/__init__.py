"""One module per part of the contract's table of calls."""
