#!/bin/sh
# Run once by the image, when the database is made. The service and the workers connect as a role that does not own the tables:
# `unlearn migrate --grant-to unlearn_service` gives it what they need.
set -eu
psql --no-psqlrc --set=ON_ERROR_STOP=1 --username="$POSTGRES_USER" --dbname="$POSTGRES_DB" <<'SQL'
\getenv password SERVICE_PASSWORD
CREATE ROLE unlearn_service LOGIN PASSWORD :'password';
SQL
