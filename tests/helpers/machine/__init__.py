"""Around a test: processes that it starts, the network that it lacks, what a card measured."""
