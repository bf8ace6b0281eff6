"""The tests, in folders that mirror the package; `whole` tests it as its user meets it."""
