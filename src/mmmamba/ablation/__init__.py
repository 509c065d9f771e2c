"""What matters in a recipe: tables of cells (changes to a recipe × seeds), each distilled, asked and written down."""
