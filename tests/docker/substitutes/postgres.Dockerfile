# Debian's PostgreSQL behind the variables, volume and first-start scripts of the official image.
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends postgresql && rm -rf /var/lib/postgresql/15/main \
    && ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/
COPY postgres.sh /entrypoint.sh
VOLUME /var/lib/postgresql/data
ENTRYPOINT ["bash", "/entrypoint.sh"]
