"""What several kinds of figures are drawn with: canvas, looks, legends, rows and lines."""
