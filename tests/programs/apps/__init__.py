"""Small programs of the tests; they know nothing of ulnet."""
