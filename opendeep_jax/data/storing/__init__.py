"""Making, checking and laying out token stores; `data/store.py` reads them."""
