"""Turn 8-bit matches at the size of the encoder's input into files of the size of the photo."""
