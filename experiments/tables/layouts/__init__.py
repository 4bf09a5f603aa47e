"""How tables look: their columns and cells, what is said around them, and the forms they take."""
