"""The real roles behind `loop.Roles`, in one process: a handle is the value itself."""

import torch

from rlhf_ray.data.role_files import read_prompt_columns, read_role
from rlhf_ray.models.critic import build_critic
from rlhf_ray.models.load import load_causal_lm
from rlhf_ray.models.trained_part import train_only_part
from rlhf_ray.models.wire import pack_weights
from rlhf_ray.rewards.from_recipe import judge_scorer, reward_scorer
from rlhf_ray.roles.configs import experience_config, policy_loss_config
from rlhf_ray.roles.critic_trainer import CriticTrainer
from rlhf_ray.roles.experience_maker import ExperienceMaker
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.policy_trainer import PolicyTrainer
from rlhf_ray.roles.reference_policy import Reference
from rlhf_ray.roles.reward import Reward
from rlhf_ray.training.deepspeed_engine import Forwarded
from rlhf_ray.training.forward import LogprobModel, ValueModel


class TorchEngine:
    """DeepSpeedEngine's protocol for one rank, in plain torch."""

    device = torch.device("cpu")

    def __init__(self, module, max_grad_norm=1.0):
        self.module, self.max_grad_norm = module, max_grad_norm
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, eps=1e-5, weight_decay=0.0)

    def forward(self, *batch, keep_graph=False, **options):
        self.module.train(keep_graph)
        with torch.set_grad_enabled(keep_graph):
            return self.module(*batch, **options)

    def step(self, microbatches, loss_of, *, learning_rate):
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.zero_grad()
        self.module.train()
        for inputs, rest in microbatches:
            output = inputs.output if isinstance(inputs, Forwarded) else self.module(*inputs)
            loss_of(output, rest).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)
        self.optimizer.step()
        return float(norm)

    def weights(self):
        return ((name, each) for name, each in self.module.named_parameters() if each.requires_grad)

    def sum_over_ranks(self, value):
        return value

    def most_over_ranks(self, value):
        return value


class Each:
    """Several plain roles of a kind: chunk i goes to number i modulo their number."""

    def __init__(self, *roles):
        self.roles = roles

    def each(self, method, parts):
        return [getattr(self.roles[i % len(self.roles)], method)(part) for i, part in enumerate(parts)]


class LocalGeneration(Each):
    synced = True  # False: weights get lost on the way

    def generate(self, chunks):
        return self.each("generate", chunks)

    def load_weights(self, weights, policy_version):
        named = {name: array for part in weights for name, array in part.items()}
        return [role.load_weights(named, policy_version) for role in self.roles] if self.synced else []


class LocalReward(Each):
    def score(self, rollouts):
        return self.each("score", rollouts)

    def judge(self, rollouts):
        return self.each("judge", rollouts)

    def texts(self, rollout, count):
        return self.roles[0].texts(rollout, count)


class LocalReference(Each):
    def logprobs(self, rollouts):
        return self.each("logprobs", rollouts)


class AdapterOff(Each):
    def logprobs(self, rollouts):
        return self.each("reference_logprobs", rollouts)


class LocalTrainer(Each):
    def logprobs(self, rollouts):
        return self.each("logprobs", rollouts)

    def values(self, rollouts):
        return self.each("values", rollouts)

    def update(self, shards, *rates):
        return [self.roles[0].update(shard, *rates) for shard in shards]

    def weights(self):
        return pack_weights(self.roles[0].weights(), 2, torch.float32)


class LocalRoles:
    """All of a recipe's roles, in float32 (generation in bfloat16 if the recipe says so).

    actors: number of generators, reward models and references.
    """

    def __init__(self, recipe, folder, actors=1):
        ppo, generation, start = recipe.ppo, recipe.generation, folder.stage("sft").model
        texts = [read_role(folder, role)["prompt"] for role in ("prompts", "eval_prompts")]
        drawn_in = torch.bfloat16 if generation.precision == "bfloat16" else torch.float32
        models = recipe, folder, torch.float32, "cpu"
        scorer, judge = reward_scorer(*models), judge_scorer(*models) if ppo.judge_evaluations else None
        self.generation = LocalGeneration(
            *(
                Generator(
                    start, *texts, sampling=generation.sampling, seed=recipe.seed, dtype=drawn_in,
                    lora=ppo.lora, freeze_layers=ppo.freeze_layers, engine=generation.engine, rows=generation.chunk_size,
                )
                for _ in range(actors)
            )
        )  # fmt: skip
        columns = (read_prompt_columns(folder), read_prompt_columns(folder, "eval_prompts"))
        self.reward = LocalReward(
            *(Reward(scorer, start, judge=judge, stop=generation.stop, columns=columns) for _ in range(actors))
        )
        self.reference = LocalReference(
            *(
                Reference(
                    start,
                    temperature=generation.temperature,
                    compute_dtype=torch.float32,
                    **ppo.microbatches,
                )
                for _ in range(actors)
            )
        )
        model = train_only_part(
            load_causal_lm(start), lora=ppo.lora, freeze_layers=ppo.freeze_layers,
            gradient_checkpointing=ppo.gradient_checkpointing, seed=recipe.seed,
        )  # fmt: skip
        policy = LogprobModel(model, temperature=generation.temperature, compute_dtype=torch.float32)
        self.policy = LocalTrainer(
            PolicyTrainer(
                TorchEngine(policy), **ppo.microbatches, reuse_forward=ppo.reuse_forward, config=policy_loss_config(recipe)
            )
        )
        if ppo.lora is not None:
            self.reference = AdapterOff(*self.policy.roles)
        self.critic = None
        if ppo.has_critic:
            critic = build_critic(folder.stage("reward").model, "reward")
            train_only_part(
                critic.backbone, lora=ppo.critic_lora, freeze_layers=ppo.critic_freeze_layers,
                gradient_checkpointing=ppo.gradient_checkpointing, seed=recipe.seed,
            )  # fmt: skip
            critic = ValueModel(critic, compute_dtype=torch.float32)
            self.critic = LocalTrainer(
                CriticTrainer(
                    TorchEngine(critic),
                    **ppo.microbatches,
                    reuse_forward=ppo.reuse_forward,
                    value_clip_range=ppo.value_clip_range,
                    vf_coef=ppo.vf_coef,
                )
            )
        self.experience = ExperienceMaker(experience_config(recipe))

    def wait(self, handles, what):
        pass

    def get(self, handles, what):
        return list(handles)

    @property
    def engines(self):
        return [group.roles[0].engine for group in (self.policy, self.critic) if group is not None]

    def weights(self):
        """Clones of policy and critic weights by name."""
        return {
            f"{number}/{name}": tensor.detach().clone()
            for number, engine in enumerate(self.engines)
            for name, tensor in engine.weights()
        }
