# The first start creates user, database and what the scripts say, on a server that listens on its socket only.
set -eu
data=/var/lib/postgresql/data
as() { setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }
chown postgres:postgres "$data" && chmod 700 "$data"
if [ ! -s "$data/PG_VERSION" ]; then
    as bash -c "initdb -D $data --encoding=UTF8 --locale=C.UTF-8 --username=$POSTGRES_USER --auth-local=trust --auth-host=scram-sha-256 \
        --pwfile=<(printf %s \"\$POSTGRES_PASSWORD\")"
    as pg_ctl -D "$data" -w -o "-c listen_addresses=''" start
    as createdb --username="$POSTGRES_USER" "$POSTGRES_DB"
    for script in /docker-entrypoint-initdb.d/*.sql; do
        as psql --username="$POSTGRES_USER" --dbname="$POSTGRES_DB" --file="$script"
    done
    as pg_ctl -D "$data" -w stop
    echo 'host all all all scram-sha-256' >> "$data/pg_hba.conf"
fi
exec setpriv --reuid=postgres --regid=postgres --clear-groups postgres -D "$data" -c listen_addresses='*'
