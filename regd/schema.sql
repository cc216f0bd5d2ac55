-- What regd knows, durably. One row a session, one row a file. Times are seconds since 1970 (UTC).

CREATE TABLE session (
    id          INTEGER PRIMARY KEY,
    folder      TEXT    NOT NULL UNIQUE,       -- below the data root, '/' between the parts
    subject     TEXT    NOT NULL,
    date        TEXT    NOT NULL,
    number      INTEGER NOT NULL,              -- '1' and '001' are one session on Alyx
    state       TEXT    NOT NULL DEFAULT 'waiting'
                CHECK (state IN ('waiting', 'working', 'done', 'held', 'parked')),
    flagged     INTEGER NOT NULL DEFAULT 0 CHECK (flagged IN (0, 1)),
    asked       INTEGER NOT NULL DEFAULT 0 CHECK (asked IN (0, 1)),
                                               -- `regd scan --all` asked for it, as a flag does
    eid         TEXT,                          -- its UUID on Alyx, once known
    creating_at REAL,                          -- when its creation was sent, while that may be on its way
    doubt       INTEGER NOT NULL DEFAULT 1 CHECK (doubt IN (0, 1)),
                                               -- Alyx may hold datasets of it that `file` does not know
    due_at      REAL    NOT NULL,              -- when it is looked at next, if waiting or held
    not_before  REAL    NOT NULL DEFAULT 0,    -- ... and never before, whatever happens meanwhile
    hinted_at   REAL,                          -- something happened while it was in work: due then
    listing     BLOB,                          -- what its folder looked like when a scan compared it
                                               -- with `file` and found nothing to do; NULL since then
    attempt     INTEGER NOT NULL DEFAULT 0,    -- failures since the last success
    looked      INTEGER NOT NULL DEFAULT 0,    -- how often Alyx was asked for it in vain, while held
    reason      TEXT,                          -- why it waits, is held or parked
    hint        TEXT,                          -- what a person can do about it
    first_seen_at REAL  NOT NULL,
    changed_at  REAL    NOT NULL,
    waiting_since REAL,                        -- when its work came up, attempts and waits included
    UNIQUE (subject, date, number),
    CHECK (state NOT IN ('parked', 'held') OR reason IS NOT NULL),
    CHECK ((state IN ('waiting', 'working')) = (waiting_since IS NOT NULL))
);
CREATE INDEX session_due ON session (due_at) WHERE state IN ('waiting', 'held');
CREATE INDEX session_state ON session (state, changed_at);
CREATE INDEX session_date ON session (date);

CREATE TABLE file (
    session_id  INTEGER NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    path        TEXT    NOT NULL,              -- below the session folder
    state       TEXT    NOT NULL
                CHECK (state IN ('settling', 'ready', 'placing', 'registered', 'refused')),
    size        INTEGER NOT NULL,              -- bytes, when last looked at
    mtime_ns    INTEGER NOT NULL,
    md5         TEXT,                          -- of that content; while settling, of what Alyx holds
    dataset_id  TEXT,                          -- its UUID on Alyx, once registered
    move_to     TEXT,                          -- the path it is being moved to; written before the move
    reason      TEXT,
    hint        TEXT,
    first_seen_at REAL  NOT NULL,              -- when this content was first seen
    changed_at  REAL    NOT NULL,
    PRIMARY KEY (session_id, path),
    CHECK ((state = 'placing') = (move_to IS NOT NULL)),
    CHECK (state <> 'refused' OR reason IS NOT NULL)
) WITHOUT ROWID;
CREATE INDEX file_state ON file (state, session_id) WHERE state <> 'registered';

-- What happened to each session, to be told. What happens again at once only adds to its row, and the
-- oldest rows go; but each move is kept, as is the file that came of it.
CREATE TABLE event (
    session_id  INTEGER NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    number      INTEGER NOT NULL,              -- in the order that things happened, whatever the clock
    name        TEXT    NOT NULL
                CHECK (name IN ('created', 'found', 'lost', 'failed', 'held', 'parked', 'resumed',
                                'interrupted', 'moved', 'unflagged', 'done')),
    about       TEXT,                          -- the UUID, the reason, or the path that was moved
    target      TEXT,                          -- the path it was moved to
    times       INTEGER NOT NULL DEFAULT 1,
    first_at    REAL    NOT NULL,
    last_at     REAL    NOT NULL,
    PRIMARY KEY (session_id, number),
    CHECK ((name = 'moved') = (target IS NOT NULL))
) WITHOUT ROWID;

-- What lies below the data root in no session.
CREATE TABLE stray (
    path        TEXT    PRIMARY KEY,
    reason      TEXT    NOT NULL,
    hint        TEXT    NOT NULL,
    scan        INTEGER NOT NULL,              -- the scan that saw it last
    seen_at     REAL    NOT NULL
) WITHOUT ROWID;

-- What another process asks the daemon to do.
CREATE TABLE request (
    id          INTEGER PRIMARY KEY,
    kind        TEXT    NOT NULL CHECK (kind IN ('scan')),
    everything  INTEGER NOT NULL DEFAULT 0 CHECK (everything IN (0, 1)),
    state       TEXT    NOT NULL DEFAULT 'asked' CHECK (state IN ('asked', 'running', 'done')),
    asked_at    REAL    NOT NULL
);

-- Single facts: the data root, the daemon, what the last scan counted.
CREATE TABLE fact (
    name        TEXT    PRIMARY KEY,
    value       TEXT    NOT NULL               -- JSON
) WITHOUT ROWID;
