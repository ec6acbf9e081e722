"""The server behind `instdiff studio`: requests, batches across requests, HTTP and the page."""
