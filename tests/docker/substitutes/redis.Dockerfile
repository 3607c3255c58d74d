# Debian's Redis for the user and folder of the official image.
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends redis-server redis-tools \
    && install -d -o 999 -g 999 /data
