"""What clients send in the forms of several APIs, turned into one, or refused: nothing is left out without a word."""
