"""Tables, figures and model cards from results files."""
