"""What a run takes on a card, by its data sheet: computed before it, from the config alone."""
