# moto in place of SeaweedFS: the same port, health check and arguments; objects are in memory.
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends wget \
    && python -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir "moto[server]==5.2.5"
COPY s3.py /s3.py
VOLUME /data
ENTRYPOINT ["/opt/venv/bin/python", "/s3.py"]
