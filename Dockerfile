# regd in a container. docs/container.md says how to build and run it; compose.yaml runs it on trial.

FROM python:3.13-slim AS build
WORKDIR /src
RUN python -m venv /opt/regd
COPY pyproject.toml README.md LICENSE ./
COPY config/regd.yaml config/
COPY systemd/regd.service systemd/
COPY regd regd
# pip is not needed to run regd
RUN /opt/regd/bin/pip install --no-cache-dir --disable-pip-version-check . \
 && /opt/regd/bin/pip uninstall --yes pip

FROM python:3.13-slim
# A fixed number, so that it can be given rights on the host. Any user may be named instead (--user):
# the journal is in a folder that regd makes itself, in a volume that everybody may write in.
RUN groupadd --gid 10001 regd \
 && useradd --uid 10001 --gid regd --no-create-home --home-dir /var/lib/regd \
      --shell /usr/sbin/nologin regd \
 && install -d -o regd -g regd -m 0750 /data \
 && install -d -m 1777 /var/lib/regd \
 && install -d -m 0755 /etc/regd /etc/regd/secrets
COPY --from=build /opt/regd /opt/regd
ENV PATH=/opt/regd/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    REGD_DATA_ROOT=/data \
    REGD_STATE_DIR=/var/lib/regd/state \
    CREDENTIALS_DIRECTORY=/etc/regd/secrets
VOLUME ["/data", "/var/lib/regd"]
USER regd
# Whether regd is at work, not whether Alyx is: it waits for that, and a new container could not do
# better. A large journal is checked at the start.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
  CMD ["python", "-m", "regd.health"]
# regd puts back or finishes what is in hand within 5 s of SIGTERM.
STOPSIGNAL SIGTERM
ENTRYPOINT ["regd"]
CMD ["run"]
