"""Make a match of a visitor's own photos: uploads, turns, and the result with all that can be done with it."""
