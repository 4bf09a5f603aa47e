"""One run: compression, measurements, metrics, tracker."""
