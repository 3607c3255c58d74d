-- Logins beside the figures, in a database of their own: both have tables by the same names of migrations.
CREATE DATABASE mlflow_auth;
