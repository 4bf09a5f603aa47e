"""The methods that Camera is compared with: one file each, what several share beside them."""
