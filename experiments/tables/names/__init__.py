"""What methods, data and studies are called where people read of them."""
