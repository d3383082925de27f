CREATE FUNCTION public.audit_is_append_only() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN RAISE EXCEPTION 'audit_events is append-only: % is refused', TG_OP; END $$;
CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE public.api_keys (
    id text NOT NULL,
    name text NOT NULL,
    prefix text NOT NULL,
    digest text NOT NULL,
    scopes jsonb NOT NULL,
    created_by text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    expires_at timestamp with time zone,
    revoked_at timestamp with time zone,
    last_used_at timestamp with time zone,
    tenant_id text NOT NULL
);
CREATE TABLE public.artifacts (
    id text NOT NULL,
    job_id text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    name text NOT NULL,
    key text NOT NULL,
    media_type text NOT NULL,
    bytes bigint NOT NULL,
    sha256 text NOT NULL
);
CREATE TABLE public.audit_checks (
    tenant_id text NOT NULL,
    seq bigint NOT NULL,
    hash text NOT NULL,
    checked_at timestamp with time zone NOT NULL,
    whole_at timestamp with time zone NOT NULL,
    fault jsonb
);
CREATE TABLE public.audit_events (
    tenant_id text NOT NULL,
    seq bigint NOT NULL,
    id text NOT NULL,
    created_at timestamp with time zone NOT NULL,
    actor text NOT NULL,
    action text NOT NULL,
    object_type text NOT NULL,
    object_id text NOT NULL,
    data jsonb NOT NULL,
    prev_hash text NOT NULL,
    hash text NOT NULL
);
CREATE TABLE public.benchmarks (
    name text NOT NULL,
    suite text NOT NULL,
    corpus text NOT NULL,
    sets jsonb NOT NULL,
    retrained_model text,
    retrained_scores text,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    tenant_id text NOT NULL
);
CREATE TABLE public.certificates (
    id text NOT NULL,
    job_id text NOT NULL,
    envelope text,
    key_id text,
    audit_seq bigint,
    refusal text,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    tenant_id text NOT NULL,
    CONSTRAINT certificates_decided_check CHECK ((num_nulls(envelope, key_id, audit_seq) =
CASE
    WHEN (refusal IS NULL) THEN 0
    ELSE 3
END))
);
CREATE TABLE public.counters (
    name text NOT NULL,
    labels jsonb NOT NULL,
    value bigint NOT NULL
);
CREATE TABLE public.deletion_approvals (
    request_id text NOT NULL,
    approved_by text NOT NULL,
    submitted_by text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT deletion_approvals_four_eyes_check CHECK ((approved_by <> submitted_by))
);
CREATE TABLE public.deletion_jobs (
    request_id text NOT NULL,
    job_id text NOT NULL,
    row_numbers jsonb NOT NULL,
    tenant_id text NOT NULL
);
CREATE TABLE public.deletion_plans (
    tenant_id text NOT NULL,
    model text NOT NULL,
    job jsonb NOT NULL,
    window_seconds bigint NOT NULL,
    requests_max bigint NOT NULL,
    status_reason text,
    created_by text NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE public.deletion_requests (
    id text NOT NULL,
    version bigint DEFAULT 1 NOT NULL,
    status text NOT NULL,
    external_reference text,
    regulation text NOT NULL,
    received_at timestamp with time zone NOT NULL,
    due_at timestamp with time zone NOT NULL,
    approvals_required bigint NOT NULL,
    approved_at timestamp with time zone,
    overdue_at timestamp with time zone,
    extension jsonb,
    models jsonb NOT NULL,
    forget_set text NOT NULL,
    rows bigint NOT NULL,
    row_digests jsonb NOT NULL,
    subject_digests jsonb NOT NULL,
    denial jsonb,
    closing jsonb,
    unfit jsonb DEFAULT '{}'::jsonb NOT NULL,
    status_reason text,
    metadata jsonb DEFAULT '{}'::jsonb NOT NULL,
    created_by text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL,
    finished_at timestamp with time zone,
    tenant_id text NOT NULL,
    CONSTRAINT deletion_requests_regulation_check CHECK ((regulation = ANY (ARRAY['ccpa'::text, 'gdpr'::text, 'other'::text]))),
    CONSTRAINT deletion_requests_status_check CHECK ((status = ANY (ARRAY['approved'::text, 'cancelled'::text, 'completed'::text, 'denied'::text, 'failed'::text, 'in_progress'::text, 'pending_approval'::text, 'received'::text])))
);
CREATE TABLE public.files (
    id text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    purpose text NOT NULL,
    key text NOT NULL,
    bytes bigint NOT NULL,
    rows bigint NOT NULL,
    tenant_id text NOT NULL,
    created_by text NOT NULL,
    digest text NOT NULL,
    sealed text,
    purge_at timestamp with time zone,
    purged_at timestamp with time zone,
    CONSTRAINT files_purged_check CHECK (((purged_at IS NULL) = (sealed IS NOT NULL))),
    CONSTRAINT files_purpose_check CHECK ((purpose = ANY (ARRAY['eval_scores'::text, 'eval_set'::text, 'forget_set'::text, 'holdout_set'::text, 'refusal_set'::text, 'retain_set'::text])))
);
CREATE TABLE public.idempotency_keys (
    tenant_id text NOT NULL,
    principal text NOT NULL,
    route text NOT NULL,
    key text NOT NULL,
    fingerprint text NOT NULL,
    status bigint NOT NULL,
    body text NOT NULL,
    headers jsonb NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE public.job_checkpoints (
    job_id text NOT NULL,
    fence bigint NOT NULL,
    step bigint NOT NULL,
    key text NOT NULL,
    bytes bigint NOT NULL,
    sha256 text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE public.job_checks (
    job_id text NOT NULL,
    fence bigint NOT NULL,
    step bigint NOT NULL,
    forget_objective double precision,
    forget_probability double precision,
    retain_loss double precision,
    retain_upper double precision,
    epsilon double precision,
    feasible boolean NOT NULL,
    best boolean NOT NULL,
    rows bigint NOT NULL,
    seconds double precision NOT NULL
);
CREATE TABLE public.job_events (
    job_id text NOT NULL,
    seq bigint NOT NULL,
    id text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    attempt bigint NOT NULL,
    level text NOT NULL,
    type text NOT NULL,
    message text NOT NULL,
    data jsonb NOT NULL,
    CONSTRAINT job_events_level_check CHECK ((level = ANY (ARRAY['error'::text, 'info'::text, 'warn'::text])))
);
CREATE TABLE public.job_steps (
    job_id text NOT NULL,
    fence bigint NOT NULL,
    step bigint NOT NULL,
    losses jsonb NOT NULL,
    dual jsonb NOT NULL,
    violation jsonb NOT NULL,
    learning_rate double precision,
    gradient_norm double precision,
    tokens bigint NOT NULL,
    tokens_per_second double precision,
    elapsed_seconds double precision NOT NULL,
    extra jsonb NOT NULL
);
CREATE TABLE public.jobs (
    id text NOT NULL,
    status text NOT NULL,
    status_reason text,
    stage text,
    stage_history jsonb DEFAULT '[]'::jsonb NOT NULL,
    version bigint DEFAULT 1 NOT NULL,
    last_seq bigint DEFAULT 0 NOT NULL,
    spec jsonb NOT NULL,
    model text NOT NULL,
    method text NOT NULL,
    forget_set text NOT NULL,
    retain_set text NOT NULL,
    priority bigint NOT NULL,
    due_at timestamp with time zone,
    gpu_class text NOT NULL,
    min_vram_gib double precision,
    external_id text,
    metadata jsonb DEFAULT '{}'::jsonb NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL,
    queued_at timestamp with time zone,
    started_at timestamp with time zone,
    finished_at timestamp with time zone,
    cancel_requested_at timestamp with time zone,
    pause_requested_at timestamp with time zone,
    attempt bigint DEFAULT 0 NOT NULL,
    content_failures bigint DEFAULT 0 NOT NULL,
    infra_losses bigint DEFAULT 0 NOT NULL,
    fence bigint DEFAULT 0 NOT NULL,
    lease_owner text,
    lease_until timestamp with time zone,
    beat_at timestamp with time zone,
    rung_at timestamp with time zone,
    step bigint DEFAULT 0 NOT NULL,
    steps_total bigint,
    trained_tokens bigint DEFAULT 0 NOT NULL,
    epsilon double precision,
    base_retain_loss double precision,
    verdict jsonb,
    failure jsonb,
    warnings jsonb DEFAULT '[]'::jsonb NOT NULL,
    not_before timestamp with time zone,
    refusal_set text,
    holdout_set text,
    tenant_id text NOT NULL,
    created_by text NOT NULL,
    micro_batch_tokens bigint,
    CONSTRAINT jobs_failure_check CHECK (((status = 'failed'::text) = (failure IS NOT NULL))),
    CONSTRAINT jobs_finished_check CHECK (((status = ANY (ARRAY['cancelled'::text, 'failed'::text, 'succeeded'::text])) = (finished_at IS NOT NULL))),
    CONSTRAINT jobs_lease_check CHECK (((status = ANY (ARRAY['cancelling'::text, 'pausing'::text, 'running'::text])) = (lease_until IS NOT NULL))),
    CONSTRAINT jobs_stage_check CHECK (((stage IS NULL) OR (stage = ANY (ARRAY['evaluating'::text, 'loading_model'::text, 'packaging'::text, 'preparing'::text, 'signing'::text, 'unlearning'::text, 'uploading'::text])))),
    CONSTRAINT jobs_status_check CHECK ((status = ANY (ARRAY['cancelled'::text, 'cancelling'::text, 'failed'::text, 'paused'::text, 'pausing'::text, 'pending_approval'::text, 'queued'::text, 'running'::text, 'succeeded'::text])))
);
CREATE TABLE public.models (
    name text NOT NULL,
    source text NOT NULL,
    location text NOT NULL,
    revision text,
    digest text,
    tokenizer_digest text,
    prompt_format jsonb NOT NULL,
    gpu_class text NOT NULL,
    info jsonb NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT models_source_check CHECK ((source = ANY (ARRAY['hub'::text, 'path'::text])))
);
CREATE TABLE public.signing_keys (
    id text NOT NULL,
    public_jwk jsonb NOT NULL,
    sealed_private text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    retired_at timestamp with time zone
);
CREATE TABLE public.tenants (
    id text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    approvals bigint DEFAULT 0 NOT NULL,
    keep_files_days bigint,
    keep_forgotten_days bigint DEFAULT 0 NOT NULL,
    max_running_jobs bigint,
    max_open_jobs bigint,
    CONSTRAINT tenants_approvals_check CHECK (((approvals >= 0) AND (approvals <= 2))),
    CONSTRAINT tenants_keep_files_days_check CHECK ((keep_files_days >= 0)),
    CONSTRAINT tenants_keep_forgotten_days_check CHECK ((keep_forgotten_days >= 0)),
    CONSTRAINT tenants_max_open_jobs_check CHECK ((max_open_jobs > 0)),
    CONSTRAINT tenants_max_running_jobs_check CHECK ((max_running_jobs > 0))
);
CREATE TABLE public.webhook_attempts (
    delivery_id text NOT NULL,
    number bigint NOT NULL,
    at timestamp with time zone DEFAULT now() NOT NULL,
    status bigint,
    latency_ms bigint NOT NULL,
    reply text NOT NULL,
    error text
);
CREATE TABLE public.webhook_deliveries (
    id text NOT NULL,
    message_id text NOT NULL,
    endpoint_id text NOT NULL,
    status text DEFAULT 'pending'::text NOT NULL,
    attempts bigint DEFAULT 0 NOT NULL,
    next_at timestamp with time zone DEFAULT now(),
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    finished_at timestamp with time zone,
    tenant_id text NOT NULL,
    CONSTRAINT webhook_deliveries_next_at_check CHECK (((status = 'pending'::text) = (next_at IS NOT NULL))),
    CONSTRAINT webhook_deliveries_status_check CHECK ((status = ANY (ARRAY['cancelled'::text, 'delivered'::text, 'failed'::text, 'pending'::text])))
);
CREATE TABLE public.webhook_endpoints (
    id text NOT NULL,
    url text NOT NULL,
    description text NOT NULL,
    event_types jsonb NOT NULL,
    status text DEFAULT 'enabled'::text NOT NULL,
    status_reason text,
    sealed_secret text NOT NULL,
    sealed_old_secret text,
    old_secret_until timestamp with time zone,
    failing_since timestamp with time zone,
    leased_until timestamp with time zone,
    created_by text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL,
    tenant_id text NOT NULL,
    CONSTRAINT webhook_endpoints_status_check CHECK ((status = ANY (ARRAY['disabled'::text, 'enabled'::text])))
);
CREATE TABLE public.webhook_messages (
    id text NOT NULL,
    type text NOT NULL,
    body text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    tenant_id text NOT NULL
);
CREATE TABLE public.workers (
    name text NOT NULL,
    gpu_classes jsonb NOT NULL,
    vram_gib double precision NOT NULL,
    seen_at timestamp with time zone DEFAULT now() NOT NULL
);
INSERT INTO public.alembic_version VALUES ('0009');
INSERT INTO public.deletion_requests VALUES ('dreq_00000000000000000000000000000001', 1, 'received', NULL, 'gdpr', '2026-01-01 00:00:00+00', '2026-02-01 00:00:00+00', 1, NULL, NULL, NULL, '["m"]', 'ufile_00000000000000000000000000000001', 1, '[]', '[]', NULL, NULL, '{}', NULL, '{}', 'system', '2026-11-30 21:04:46.166413+00', '2026-11-30 21:04:46.166413+00', NULL, 'default');
INSERT INTO public.files VALUES ('ufile_00000000000000000000000000000001', '2026-11-30 21:04:46.166413+00', 'forget_set', 'files/1', 10, 1, 'default', 'system', 'hmac-sha256:00', 'x', NULL, NULL);
INSERT INTO public.jobs VALUES ('ujob_00000000000000000000000000000001', 'queued', NULL, NULL, '[]', 1, 0, '{"seed": 3}', 'm', 'pdu', 'ufile_00000000000000000000000000000001', 'ufile_2', 5, NULL, 'any', NULL, NULL, '{}', '2026-11-30 21:04:46.166413+00', '2026-11-30 21:04:46.166413+00', NULL, NULL, NULL, NULL, NULL, 0, 0, 0, 0, NULL, NULL, NULL, NULL, 0, NULL, 0, NULL, NULL, NULL, NULL, '[]', NULL, NULL, NULL, 'default', 'system', NULL);
INSERT INTO public.tenants VALUES ('default', '2026-11-30 21:04:44.21571+00', 0, NULL, 0, NULL, NULL);
INSERT INTO public.workers VALUES ('w', '["any"]', 0, '2026-11-30 21:04:46.166413+00');
ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT api_keys_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT api_keys_prefix_key UNIQUE (prefix);
ALTER TABLE ONLY public.artifacts
    ADD CONSTRAINT artifacts_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.audit_checks
    ADD CONSTRAINT audit_checks_pkey PRIMARY KEY (tenant_id);
ALTER TABLE ONLY public.audit_events
    ADD CONSTRAINT audit_events_id_key UNIQUE (id);
ALTER TABLE ONLY public.audit_events
    ADD CONSTRAINT audit_events_pkey PRIMARY KEY (tenant_id, seq);
ALTER TABLE ONLY public.benchmarks
    ADD CONSTRAINT benchmarks_pkey PRIMARY KEY (tenant_id, name);
ALTER TABLE ONLY public.certificates
    ADD CONSTRAINT certificates_job_id_key UNIQUE (job_id);
ALTER TABLE ONLY public.certificates
    ADD CONSTRAINT certificates_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.counters
    ADD CONSTRAINT counters_pkey PRIMARY KEY (name, labels);
ALTER TABLE ONLY public.deletion_approvals
    ADD CONSTRAINT deletion_approvals_pkey PRIMARY KEY (request_id, approved_by);
ALTER TABLE ONLY public.deletion_jobs
    ADD CONSTRAINT deletion_jobs_pkey PRIMARY KEY (request_id, job_id);
ALTER TABLE ONLY public.deletion_plans
    ADD CONSTRAINT deletion_plans_pkey PRIMARY KEY (tenant_id, model);
ALTER TABLE ONLY public.deletion_requests
    ADD CONSTRAINT deletion_requests_id_created_by_key UNIQUE (id, created_by);
ALTER TABLE ONLY public.deletion_requests
    ADD CONSTRAINT deletion_requests_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.files
    ADD CONSTRAINT files_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.idempotency_keys
    ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (tenant_id, principal, route, key);
ALTER TABLE ONLY public.job_checkpoints
    ADD CONSTRAINT job_checkpoints_pkey PRIMARY KEY (job_id, fence, step);
ALTER TABLE ONLY public.job_checks
    ADD CONSTRAINT job_checks_pkey PRIMARY KEY (job_id, fence, step);
ALTER TABLE ONLY public.job_events
    ADD CONSTRAINT job_events_id_key UNIQUE (id);
ALTER TABLE ONLY public.job_events
    ADD CONSTRAINT job_events_pkey PRIMARY KEY (job_id, seq);
ALTER TABLE ONLY public.job_steps
    ADD CONSTRAINT job_steps_pkey PRIMARY KEY (job_id, fence, step);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.models
    ADD CONSTRAINT models_pkey PRIMARY KEY (name);
ALTER TABLE ONLY public.signing_keys
    ADD CONSTRAINT signing_keys_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.tenants
    ADD CONSTRAINT tenants_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.webhook_attempts
    ADD CONSTRAINT webhook_attempts_pkey PRIMARY KEY (delivery_id, number);
ALTER TABLE ONLY public.webhook_deliveries
    ADD CONSTRAINT webhook_deliveries_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.webhook_endpoints
    ADD CONSTRAINT webhook_endpoints_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.webhook_messages
    ADD CONSTRAINT webhook_messages_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.workers
    ADD CONSTRAINT workers_pkey PRIMARY KEY (name);
CREATE INDEX api_keys_tenant_id_id_idx ON public.api_keys USING btree (tenant_id, id);
CREATE UNIQUE INDEX artifacts_job_id_name_idx ON public.artifacts USING btree (job_id, name);
CREATE INDEX audit_events_tenant_id_object_id_seq_idx ON public.audit_events USING btree (tenant_id, object_id, seq);
CREATE INDEX deletion_jobs_job_id_idx ON public.deletion_jobs USING btree (job_id);
CREATE INDEX deletion_requests_subject_digests_idx ON public.deletion_requests USING gin (subject_digests);
CREATE INDEX deletion_requests_tenant_id_id_idx ON public.deletion_requests USING btree (tenant_id, id);
CREATE INDEX deletion_requests_tenant_id_status_due_at_idx ON public.deletion_requests USING btree (tenant_id, status, due_at);
CREATE INDEX files_purge_at_idx ON public.files USING btree (purge_at) WHERE ((purged_at IS NULL) AND (purge_at IS NOT NULL));
CREATE INDEX files_tenant_id_id_idx ON public.files USING btree (tenant_id, id);
CREATE INDEX idempotency_keys_created_at_idx ON public.idempotency_keys USING btree (created_at);
CREATE INDEX jobs_claim_idx ON public.jobs USING btree (priority DESC, due_at, queued_at, id) WHERE (status = 'queued'::text);
CREATE INDEX jobs_lease_idx ON public.jobs USING btree (lease_until) WHERE (status = ANY (ARRAY['cancelling'::text, 'pausing'::text, 'running'::text]));
CREATE INDEX jobs_status_gpu_class_idx ON public.jobs USING btree (status, gpu_class);
CREATE INDEX jobs_tenant_id_id_idx ON public.jobs USING btree (tenant_id, id);
CREATE INDEX jobs_tenant_id_model_id_idx ON public.jobs USING btree (tenant_id, model, id);
CREATE INDEX jobs_tenant_id_status_id_idx ON public.jobs USING btree (tenant_id, status, id);
CREATE UNIQUE INDEX signing_keys_active_idx ON public.signing_keys USING btree ((true)) WHERE (retired_at IS NULL);
CREATE INDEX webhook_deliveries_due_idx ON public.webhook_deliveries USING btree (endpoint_id, next_at) WHERE (status = 'pending'::text);
CREATE INDEX webhook_deliveries_endpoint_id_id_idx ON public.webhook_deliveries USING btree (endpoint_id, id);
CREATE INDEX webhook_deliveries_message_id_idx ON public.webhook_deliveries USING btree (message_id);
CREATE INDEX webhook_endpoints_tenant_id_id_idx ON public.webhook_endpoints USING btree (tenant_id, id);
CREATE TRIGGER audit_events_append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON public.audit_events FOR EACH STATEMENT EXECUTE FUNCTION public.audit_is_append_only();
ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT api_keys_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.artifacts
    ADD CONSTRAINT artifacts_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.audit_checks
    ADD CONSTRAINT audit_checks_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.audit_events
    ADD CONSTRAINT audit_events_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.benchmarks
    ADD CONSTRAINT benchmarks_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.certificates
    ADD CONSTRAINT certificates_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.jobs(id);
ALTER TABLE ONLY public.certificates
    ADD CONSTRAINT certificates_key_id_fkey FOREIGN KEY (key_id) REFERENCES public.signing_keys(id);
ALTER TABLE ONLY public.certificates
    ADD CONSTRAINT certificates_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.deletion_approvals
    ADD CONSTRAINT deletion_approvals_request_id_fkey FOREIGN KEY (request_id, submitted_by) REFERENCES public.deletion_requests(id, created_by);
ALTER TABLE ONLY public.deletion_jobs
    ADD CONSTRAINT deletion_jobs_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.jobs(id);
ALTER TABLE ONLY public.deletion_jobs
    ADD CONSTRAINT deletion_jobs_request_id_fkey FOREIGN KEY (request_id) REFERENCES public.deletion_requests(id);
ALTER TABLE ONLY public.deletion_jobs
    ADD CONSTRAINT deletion_jobs_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.deletion_plans
    ADD CONSTRAINT deletion_plans_model_fkey FOREIGN KEY (model) REFERENCES public.models(name);
ALTER TABLE ONLY public.deletion_plans
    ADD CONSTRAINT deletion_plans_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.deletion_requests
    ADD CONSTRAINT deletion_requests_forget_set_fkey FOREIGN KEY (forget_set) REFERENCES public.files(id);
ALTER TABLE ONLY public.deletion_requests
    ADD CONSTRAINT deletion_requests_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.files
    ADD CONSTRAINT files_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.idempotency_keys
    ADD CONSTRAINT idempotency_keys_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.job_checkpoints
    ADD CONSTRAINT job_checkpoints_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.job_checks
    ADD CONSTRAINT job_checks_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.job_events
    ADD CONSTRAINT job_events_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.job_steps
    ADD CONSTRAINT job_steps_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.webhook_attempts
    ADD CONSTRAINT webhook_attempts_delivery_id_fkey FOREIGN KEY (delivery_id) REFERENCES public.webhook_deliveries(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.webhook_deliveries
    ADD CONSTRAINT webhook_deliveries_endpoint_id_fkey FOREIGN KEY (endpoint_id) REFERENCES public.webhook_endpoints(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.webhook_deliveries
    ADD CONSTRAINT webhook_deliveries_message_id_fkey FOREIGN KEY (message_id) REFERENCES public.webhook_messages(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.webhook_deliveries
    ADD CONSTRAINT webhook_deliveries_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.webhook_endpoints
    ADD CONSTRAINT webhook_endpoints_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.webhook_messages
    ADD CONSTRAINT webhook_messages_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
