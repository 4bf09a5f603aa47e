"""What a module of experts is: its layout, its activation, and its interface."""
