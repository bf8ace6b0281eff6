"""Mixed models beside the packages made for them."""
