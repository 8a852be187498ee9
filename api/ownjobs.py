"""Jobs of the caller: another key's are not found, whatever is asked of them."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path

from api.access import OwnerDep
from api.services import ServicesDep


def own_job(
    job_id: Annotated[str, Path(description="the id of a job", examples=["01M827J2N7FR429X5AQYRY517N"])],
    owner: OwnerDep,
    services: ServicesDep,
) -> str:
    """Return the id of a job that is the caller's.

    Raises:
        JobNotFoundError: it is not, or there is none.
    """
    services.store.check_owner(job_id, owner)
    return job_id


OwnJobId = Annotated[str, Depends(own_job)]
