"""What the rooms share: job records, settings, storage layout, Parquet schema, queue names. No torch, no HTTP.

Import from the modules: this package re-exports neither the queue nor the storage, so that a client that only reads
Parquet never imports Celery.
"""

from jobs.errors import JobsError
from jobs.records import JobOptions, JobRecord, JobStatus, JobView, Manifest

__all__ = ["JobOptions", "JobRecord", "JobStatus", "JobView", "JobsError", "Manifest"]
