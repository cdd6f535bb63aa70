"""Run directories: columns, shards, records and the processes that fill them."""
