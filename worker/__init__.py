"""Celery workers: take a chunk or a request, call the encoder, write the part or send the reply."""
