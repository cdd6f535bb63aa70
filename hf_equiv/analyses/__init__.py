"""The four analyses: match, spectrum, lipschitz, walk."""
