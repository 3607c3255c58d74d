-- Logins need a separate database: MLflow's metrics and logins both have a migration table of the same name.
CREATE DATABASE mlflow_auth;
