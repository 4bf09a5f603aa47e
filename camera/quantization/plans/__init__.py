"""How many bits each micro-expert gets: shares of groups, plans within a target, their form."""
