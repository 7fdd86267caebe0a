"""One pretraining method a file; `pretrain.catalog` lists them."""
